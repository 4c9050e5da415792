"""The programs of PyTorch's getting-started recipe for DCP, written against ``import reference as dcp``."""
