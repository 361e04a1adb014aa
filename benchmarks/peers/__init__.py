"""Other people's methods, where no package that can be installed here has them, each from its published description."""
