"""The methods of the control interface: plain functions by subject, and the table that names them."""
