"""What a predict run leaves on disk, how it is written beside the network, and how it is read again."""
