"""Everything that talks: stable process groups, the control plane's channel, the data plane's links."""
