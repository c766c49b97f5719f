"""Tables in markdown."""


def table(title, columns, rows):
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join([f"**{title}**", "", *("| " + " | ".join(line) + " |" for line in lines), ""])


def times(size, unit):
    return f"{size / unit:.2f}x"


def cost(program, unit):
    """Kernels and traffic of a program; conditionals if there are any."""
    plural = "s" if program.kernels != 1 else ""
    choices = f", {program.conditionals} conditional" if program.conditionals else ""
    return f"{program.kernels} kernel{plural}, {times(program.bytes, unit)}{choices}"
