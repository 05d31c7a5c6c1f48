"""Reports: a page that opens without a network, and its pictures as files."""
