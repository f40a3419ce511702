"""Reading and writing checkpoints: names, folders, single files."""
