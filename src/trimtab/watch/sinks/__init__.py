"""Where the numbers go beside the run log: TensorBoard, Weights & Biases, and the callbacks of two trainers.

A sink is any object with `write(line, readings)`, called with every logged line and the reading of every head, and
`close()`. Each module here needs a library of its own and is imported by name, never by `import trimtab`.
"""
