"""Known wrong versions of a function of menas.py: a test's own check must refuse them."""
import ast
import inspect

import menas


def mutate(monkeypatch, name, *changes):
    """menas.NAME with pieces of its code replaced, (old, new) each, until monkeypatch undoes it; in
    the tables of menas.py, too. What is not there as written may be there as ast.unparse() writes
    it, whatever the layout."""
    right = getattr(menas, name)
    source = inspect.getsource(right)
    if not all(old in source for old, _ in changes):
        source = ast.unparse(ast.parse(source))
    for old, new in changes:
        assert old in source, f"the code that a mutant of {name} changes is gone: {old}"
        source = source.replace(old, new, 1)
    monkeypatch.setattr(menas, name, right)
    exec(source, vars(menas))
    for table in [x for x in vars(menas).values() if isinstance(x, dict)]:
        for key in [key for key, x in table.items() if x is right]:
            monkeypatch.setitem(table, key, getattr(menas, name))
