"""Between tensors and host memory: pieces, snapshots, and the store that keeps them."""
