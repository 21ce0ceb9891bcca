"""Files of networks: what is in them, read without running code, and how a network is made of it and saved."""
