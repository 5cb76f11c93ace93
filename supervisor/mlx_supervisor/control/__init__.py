"""The control interface: Supervisord's XML-RPC methods and `training.*`, over a Unix socket private to its owner."""
