"""What every operator means: plain PyTorch in fp64, step by step as the papers write it."""
