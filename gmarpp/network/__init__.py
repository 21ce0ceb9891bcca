"""Facts about a network: its architecture, output and preprocessing; how it is built, loaded and saved."""
