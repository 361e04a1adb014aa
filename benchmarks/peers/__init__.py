"""Methods that are compared with and that PEFT doesn't have: short versions at their published settings."""
