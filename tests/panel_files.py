"""The files that say which markers each core of a test's folder has."""


def write_panels(folder, panels, of_core):
    """``panels`` are markers by panel, ``of_core`` the panel of every core, core_00 first."""
    rows = [f"core_{core:02d},{panel}" for core, panel in enumerate(of_core)]
    (folder / "panels.csv").write_text("\n".join(["core,panel", *rows]))
    for panel, names in panels.items():
        (folder / f"panel_{panel}.txt").write_text("\n".join(names))
