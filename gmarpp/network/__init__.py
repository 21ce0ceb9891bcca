"""What there is to know of a network: its architecture, output and preprocessing; how it is built, loaded and saved."""
