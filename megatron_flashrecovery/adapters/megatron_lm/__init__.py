"""The adapter for Megatron-LM's own ``pretrain()``: hooks into a checkout that is not changed."""
