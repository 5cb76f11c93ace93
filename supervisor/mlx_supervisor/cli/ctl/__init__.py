"""`supervisorctl`: Supervisord's command line, over the same socket."""
