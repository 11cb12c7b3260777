"""What archives cost real models: checkpoints to fetch, and studies on them."""
