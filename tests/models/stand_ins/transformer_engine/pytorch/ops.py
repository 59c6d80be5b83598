class Sequential:
    pass


FusibleOperation = Sequential
