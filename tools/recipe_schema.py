"""Write recipes/*.schema.json, by which editors complete and check recipes; after a change of a key.

python tools/recipe_schema.py
"""

import json
from pathlib import Path

from hafrm.recipe import Recipe
from hafrm.rlhf.rlhf_recipe import RlhfRecipe

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
SCHEMAS = {
    FOLDER / f"{name}.schema.json": json.dumps(kind.model_json_schema(), indent=1) + "\n"
    for name, kind in (("recipe", Recipe), ("rlhf-recipe", RlhfRecipe))
}

if __name__ == "__main__":
    for file, text in SCHEMAS.items():
        file.write_text(text)
