INSTALL = "pip install ."  # in the folder of its sources: the package is on no index yet
__version__ = "0.2.0"
