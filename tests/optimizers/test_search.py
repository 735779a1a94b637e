"""What a search's table says."""

from __future__ import annotations

from helpers.optimizers import search


def test_rewards_of_each_search_early_late_and_best():
    rows = [
        {"method": method, "search": own, "round": number, "rule": f"{own} {number}", "reward": reward}
        for method in search.METHODS
        for own, rewards in enumerate([(0.1, 0.2, 0.6, 0.5), (0.3, 0.3, 0.7, 0.9)])
        for number, reward in enumerate(rewards)
    ]
    found = search.rewards(rows, 2, late=0.25)
    assert len(found) == 4 * len(search.METHODS)
    assert found["random_late_reward"] == [0.5, 0.9] and found["random_early_reward"] == [0.1, 0.3]
    assert [round(mean, 9) for mean in found["evolution_reward"]] == [0.35, 0.55]
    assert [round(mean, 9) for mean in found["controller_best"]] == [0.35, 0.55]  # the best ten are all four
    assert search.rewards(rows, 2, late=0.01)["random_late_reward"] == [0.5, 0.9]  # one round at the least
