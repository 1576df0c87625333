"""Names and addresses of an inventory."""

from names import differing_settings


def test_a_setting_of_the_fleet_that_one_host_sets_alone_is_named() -> None:
    hostvars = {"a": {"glm_image": "x:1", "glm_model": "m"}, "b": {"glm_model": "m"}}
    found = differing_settings(["a", "b"], hostvars, ["glm_image", "glm_model"])
    assert len(found) == 1 and found[0].startswith("glm_image: differs")


def test_the_same_setting_everywhere_is_no_finding() -> None:
    assert differing_settings(["a", "b"], {"a": {"glm_image": "x"}, "b": {"glm_image": "x"}}, ["glm_image"]) == []
