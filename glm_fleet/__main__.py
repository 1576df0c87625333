"""python -m glm_fleet"""

from glm_fleet.cli import main

main()
