"""The AR model as a service for many decoders, on Ray Serve."""
