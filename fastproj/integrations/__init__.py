"""Where other libraries meet the methods."""
