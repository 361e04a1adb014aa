"""Methods that are compared with and that no installable package has: short versions at their published settings."""
