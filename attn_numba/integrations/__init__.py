"""One module per optional library; nothing here is imported until it is asked for."""
