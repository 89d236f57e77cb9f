"""The shipped recipes, `peftdebias run NAME`; recipe.py in the package says what a recipe holds."""
