"""The index: what a class is, where it stands and what it inherits from."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from longforge.errors import InputError
from longforge.forge.code_search.index import build_index

BASES = "class Base:\n    pass\n\n\nclass Other:\n    pass\n"

RESOLVES = {
    "same file": ({"m.py": "class Base: pass\nclass X(Base): pass\n"}, ("m.py", "Base")),
    "from import": ({"b.py": BASES, "m.py": "from b import Base\nclass X(Base): pass\n"}, ("b.py", "Base")),
    "from import as": (
        {"b.py": BASES, "m.py": "from b import Base as Z\nclass X(Z): pass\n"},
        ("b.py", "Base"),
    ),
    "module": ({"b.py": BASES, "m.py": "import b\nclass X(b.Base): pass\n"}, ("b.py", "Base")),
    "module as": ({"b.py": BASES, "m.py": "import b as q\nclass X(q.Base): pass\n"}, ("b.py", "Base")),
    "dotted module": (
        {"p/__init__.py": "", "p/b.py": BASES, "m.py": "import p.b\nclass X(p.b.Base): pass\n"},
        ("p/b.py", "Base"),
    ),
    "dotted module as": (
        {"p/__init__.py": "", "p/b.py": BASES, "m.py": "import p.b as q\nclass X(q.Base): pass\n"},
        ("p/b.py", "Base"),
    ),
    "module from package": (
        {"p/__init__.py": "", "p/b.py": BASES, "m.py": "from p import b\nclass X(b.Base): pass\n"},
        ("p/b.py", "Base"),
    ),
    "package without __init__": (
        {"p/b.py": BASES, "m.py": "from p import b\nclass X(b.Base): pass\n"},
        ("p/b.py", "Base"),
    ),
    "relative": (
        {"p/__init__.py": "", "p/b.py": BASES, "p/m.py": "from . import b\nclass X(b.Base): pass\n"},
        ("p/b.py", "Base"),
    ),
    "relative, two up": (
        {"p/b.py": BASES, "p/q/m.py": "from ..b import Base\nclass X(Base): pass\n"},
        ("p/b.py", "Base"),
    ),
    "re-exported by a package": (
        {
            "p/__init__.py": "from .b import Base\n",
            "p/b.py": BASES,
            "m.py": "import p\nclass X(p.Base): pass\n",
        },
        ("p/b.py", "Base"),
    ),
    "star import": ({"b.py": BASES, "m.py": "from b import *\nclass X(Base): pass\n"}, ("b.py", "Base")),
    "assignment": (
        {"b.py": BASES + "Alias = Base\n", "m.py": "import b\nclass X(b.Alias): pass\n"},
        ("b.py", "Base"),
    ),
    "generic": ({"m.py": "class Base: pass\nclass X(Base[int]): pass\n"}, ("m.py", "Base")),
    "multi-line": ({"m.py": "class Base: pass\nclass X(\n    Base,\n): pass\n"}, ("m.py", "Base")),
    "metaclass besides": ({"m.py": "class Base: pass\nclass X(Base, metaclass=M): pass\n"}, ("m.py", "Base")),
    "guarded import": (
        {
            "b.py": BASES,
            "m.py": "try:\n    from b import Base\nexcept ImportError:\n    import b\nclass X(Base): pass\n",
        },
        ("b.py", "Base"),
    ),
    "two meanings": (
        {
            "b.py": BASES,
            "m.py": "from b import Base\nif 1:\n    from b import Other as Base\nclass X(Base): pass\n",
        },
        None,
    ),
    "two bases": ({"m.py": "class Base: pass\nclass X(Base, object): pass\n"}, None),
    "outside the tree": ({"m.py": "from nowhere import Base\nclass X(Base): pass\n"}, None),
    "built in": ({"m.py": "class X(ValueError): pass\n"}, None),
    "computed": ({"m.py": "class X(make()): pass\n"}, None),
    "circle": ({"m.py": "A = B\nB = A\nclass X(A): pass\n"}, None),
    "imports in a circle": (
        {"a.py": "from m import Q\n", "m.py": "from a import Q\nclass X(Q): pass\n"},
        None,
    ),
}


@pytest.mark.parametrize("case", RESOLVES)
def test_a_base_is_followed_to_the_one_class_it_means(make_tree, case: str) -> None:
    files, expected = RESOLVES[case]
    index = build_index(make_tree(files))
    (subject,) = [entry for entry in index.classes if entry.name == "X"]
    assert subject.base == expected


def test_a_class_is_described_as_it_is_written(make_tree) -> None:
    text = '"""doc"""\n\n@decorate\nclass X(a.B, C[int], metaclass=M):\n    y = 1\n'
    (entry,) = build_index(make_tree({"m.py": text})).classes
    assert (entry.path, entry.line, entry.bases) == ("m.py", 4, ("a.B", "C[int]"))


@pytest.mark.parametrize(
    ("body", "first"),
    [
        ("    def a(self): pass\n    def b(self): pass\n", ("a", 2)),
        ("    def __init__(self): pass\n    async def b(self): pass\n", ("b", 3)),
        ("    @property\n    def a(self): pass\n", ("a", 3)),
        ("    def __init__(self):\n        def inner(): pass\n    def b(self): pass\n", None),
        ("    class Inner:\n        def a(self): pass\n    def b(self): pass\n", None),
        ("    if 1:\n        def a(self): pass\n    def b(self): pass\n", None),
        ("    def __init__(self): pass\n", None),
        ("    pass\n", None),
    ],
)
def test_the_first_method_is_the_first_def_that_a_reader_meets(make_tree, body: str, first) -> None:
    (entry,) = [e for e in build_index(make_tree({"m.py": "class X:\n" + body})).classes if e.name == "X"]
    method = entry.first_method
    assert (method and (method.name, method.line)) == first


def test_nested_classes_are_no_subjects_but_make_a_name_ambiguous(make_tree) -> None:
    index = build_index(
        make_tree({"m.py": "class X: pass\ndef f():\n    class X: pass\n    class Y: pass\n"})
    )
    assert [entry.name for entry in index.classes] == ["X"]
    assert not index.unique("X") and index.unique("Y")


def test_files_that_do_not_parse_are_skipped_and_counted(make_tree) -> None:
    root = make_tree({"good.py": "class X: pass\n", "bad.py": "class (:\n", "nul.py": "x = '\0'\n"})
    (root / "latin.py").write_bytes(b"# \xe9\nclass Y: pass\n")
    index = build_index(root)
    assert [entry.name for entry in index.classes] == ["X"]
    assert index.skipped == ("bad.py", "latin.py", "nul.py")


def test_tests_caches_and_hidden_folders_are_left_out(make_tree) -> None:
    paths = [
        "a.py",
        "test/b.py",
        "p/tests/c.py",
        "__pycache__/d.py",
        "site-packages/e.py",
        ".venv/f.py",
        "g.txt",
    ]
    index = build_index(make_tree(dict.fromkeys(paths, "class X: pass\n")))
    assert [file.path for file in index.tree.files] == ["a.py"]


def test_links_out_of_the_tree_are_not_followed(make_tree, tmp_path: Path) -> None:
    root = make_tree({"a.py": "class X: pass\n"})
    (tmp_path / "secret.py").write_text("class Secret: pass\n")
    (root / "link.py").symlink_to(tmp_path / "secret.py")
    (root / "folder").symlink_to(tmp_path)
    assert [file.path for file in build_index(root).tree.files] == ["a.py"]


def test_a_folder_that_may_not_be_listed_is_left_out(make_tree, monkeypatch) -> None:
    root = make_tree({"a.py": "class A: pass\n", "shut/b.py": "class B: pass\n"})
    listing = Path.iterdir

    def refuse(folder: Path) -> Iterator[Path]:
        if folder.name == "shut":
            raise PermissionError
        return listing(folder)

    monkeypatch.setattr(Path, "iterdir", refuse)
    index = build_index(root)
    assert [entry.name for entry in index.classes] == ["A"] and index.skipped == ("shut",)


def test_the_same_tree_gives_the_same_index(make_tree) -> None:
    names = [f"p{i % 5}/m{i}.py" for i in range(30)]
    random.Random(0).shuffle(names)
    root = make_tree({name: f"class C{name[-4]}: pass\nclass D(object): pass\n" for name in names})
    first, second = build_index(root), build_index(root)
    assert first.classes == second.classes
    assert list(first.classes) == sorted(first.classes, key=lambda entry: (entry.path, entry.line))


@pytest.mark.parametrize("make", [lambda p: p / "missing", lambda p: p])
def test_a_tree_without_python_files_is_refused_in_one_line(tmp_path: Path, make) -> None:
    with pytest.raises(InputError, match=r"tree: expected .*, (got|found)") as refusal:
        build_index(make(tmp_path))
    assert "\n" not in str(refusal.value)


def test_the_standard_library_has_enough_to_ask_about(library) -> None:
    assert len(library.classes) > 1500
    assert sum(entry.base is not None for entry in library.classes) > 500
