"""`supervisorctl`: Supervisord's commands, over the same socket."""
