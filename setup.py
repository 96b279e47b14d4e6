"""Packaging: everything that varies stands in settings.ini, which nbdev reads too."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(here / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]
suffix = "_requirements"
extras = {key[: -len(suffix)]: value.split() for key, value in settings.items() if key.endswith(suffix)}

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license="Apache-2.0",
    keywords=settings["keywords"].split(),
    packages=find_packages(include=["sedm_kit", "sedm_kit.*"]),
    package_data={"sedm_kit": ["data/*/*.safetensors", "data/*/*.json", "data/notebooks/*.ipynb"]},
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": settings["console_scripts"].split(),
        "nbdev": ["sedm_kit=sedm_kit._modidx:d"],
    },
    zip_safe=False,
)
