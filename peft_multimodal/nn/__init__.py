"""Building blocks of the methods: they take values, and know neither configs nor PEFT."""
