from mlx_worker.words import listed


def test_a_list_says_how_many_it_leaves_out():
    assert listed(["a", "b"], 2) == "a, b"
    assert listed(["a", "b", "c"], 2) == "a, b and 1 more"
    assert listed(["a", "b", "c", "d"], 2, "; ") == "a; b and 2 more"
