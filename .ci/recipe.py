"""Renders the conda recipe with rattler-build, which fails if it is not valid."""

import pathlib

from rattler_build import Stage0Recipe, VariantConfig


recipe = pathlib.Path(__file__).parents[1] / "recipe/recipe.yaml"
variants = VariantConfig.from_yaml('python_min: ["3.11"]')
for variant in Stage0Recipe.from_file(recipe).render(variants):
    package = variant.recipe.package
    print(f"The recipe renders: {package.name} {package.version}")
