"""The paper's theory as measurements: tensors in, numbers out. Models are not known here."""
