"""What the policies feed on: load, prefixes, latency, and the decisions themselves."""
