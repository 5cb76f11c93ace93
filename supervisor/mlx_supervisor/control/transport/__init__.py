"""The Unix socket, HTTP and XML-RPC over it."""
