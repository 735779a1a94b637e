"""What the metrics of the experiments are called, and what they mean."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from helpers.lab.experiment import Experiment

# By the class of an experiment, with its paper in front where one class name stands for several. A word in capitals
# stands for a part of the name; those in NUMBERS for a number.
NUMBERS = ("STEPS", "SHOTS", "UPDATES", "ITERATIONS", "LEVEL", "ORDER", "NAMES", "SIZE")
MEANINGS: dict[str, dict[str, str]] = {
    "FewShotExperiment": {
        "transductive_accuracy": "share of queries that are classified rightly, where batch normalisation sees all "
        "queries of a task together",
        "inductive_accuracy": "share of queries that are classified rightly, each seen alone beside the support set",
        "transductive_accuracy_STEPS": "accuracy after so many inner steps, queries seen together",
        "inductive_accuracy_STEPS": "accuracy after so many inner steps, each query seen alone",
    },
    "imaml.Omniglot": {
        "leaking_accuracy": "transductive accuracy on the split of the released code, where training has seen some of "
        "the test characters",
        "leaking_share_trained": "share of the test classes of that split that training has seen",
        "unpulled_accuracy": "transductive accuracy without the pull towards θ, as the released test script adapts",
        "solver_residual": "what is left of the linear system of the meta-gradient, relative to its right-hand side",
        "solver_stationarity": "norm of the inner objective's gradient where the inner loop ended; the theory wants 0",
        "solver_indefinite": "share of tasks in which the linear solver met a direction of negative curvature",
        "spot_residual": "solver_residual on training tasks, by which a watched run is judged",
        "spot_stationarity": "solver_stationarity on training tasks, by which a watched run is judged",
        "spot_indefinite": "solver_indefinite on training tasks, by which a watched run is judged",
    },
    "imaml.Comparison": {"seconds_per_iteration": "seconds that an outer iteration of one seed took"},
    "reptile.Omniglot": {
        "transductive_accuracy_SHOTS_shot": "accuracy with so many examples of each class, queries seen together",
        "inductive_accuracy_SHOTS_shot": "accuracy with so many examples of each class, each query seen alone",
    },
    "Combinations": {
        "COMBINATION_transductive_accuracy": "accuracy of the network that moved by this combination of the gradients "
        "on its way, queries seen together; mean_… is the sum divided by its terms",
        "COMBINATION_inductive_accuracy": "the accuracy of that network where each query is seen alone",
    },
    "SinusoidStudy": {
        "NETWORK_mse_STEPS": "mean squared error after so many inner steps, of maml, of a network pretrained on all "
        "tasks, or of the oracle, which is told the task",
        "NETWORK_diverged_STEPS": "share of test tasks on which adaptation diverged; each counts with an error of 25",
        "NETWORK_median_STEPS": "median error over test tasks, which tasks that diverge do not move",
        **{
            f"NETWORK_{kind}_STEPS_{where}": f"the {kind} of that network {words}"
            for kind in ("mse", "diverged", "median")
            for where, words in (
                ("at_SHOTS", "where it adapts to so many points"),
                ("unseen_half", "on the left half of the inputs, where it adapts to five points of the right half"),
            )
        },
        "pretrained_rate": "fine-tuning rate of the pretrained network, the best on validation tasks",
    },
    "NavigationStudy": {
        "POLICY_return_STEPS": "return at new goals after so many policy-gradient steps, of maml, of a policy "
        "pretrained on all goals, of a random one, of the oracle, which sees the goal, or of maml at a constant rate; "
        "the interval is over training seeds",
        "POLICY_return_STEPS_by_goal": "the same return, with an interval over the goals",
        "POLICY_rate": "rate of the first step, the best on other goals",
        "POLICY_taken": "share of the outer steps for which a length within the trust region was found",
    },
    "SineDemo": {
        "reptile_mse_STEPS": "mean squared error on the whole wave after so many inner steps from Reptile's start",
        "scratch_mse_STEPS": "mean squared error on the whole wave after so many inner steps from a fresh network",
    },
    "SineStudy": {
        "test_mse": "mean squared error on new sines after the most steps down the learned loss",
        "ml3_mse_STEPS": "mean squared error on new sines after so many steps down the learned loss",
        "mse_mse_STEPS": "mean squared error after so many steps down that error itself, at the same rate",
        "tuned_mse_STEPS": "mean squared error after so many steps down that error itself, at the rate tuned_rate",
        "adam_LOSS_mse_STEPS": "mean squared error where Adam descends the learned loss (ml3) or the error itself "
        "(mse)",
        "arch_LOSS_mse_STEPS": "mean squared error of another network than those of training, down the learned loss "
        "(ml3) or the error itself (mse)",
        "tuned_rate": "rate at which the mean squared error is best descended on other tasks",
    },
    "ShapedSine": {
        "basin": "share of the frequencies from which going down the learned loss ends at the true one",
        "learned_basin": "the same as basin",
        "learned_basin_all": "the share learned_basin, averaged over many true frequencies",
        "mse_basin": "share of the frequencies from which going down the mean squared error ends at the true one",
        "mse_basin_all": "the share mse_basin, averaged over many true frequencies",
        "distance_STEPS": "distance from the true frequency after so many steps down the learned loss",
        "reached_STEPS": "share of test tasks that are at the true frequency after so many steps down the learned loss",
    },
    "InverseDynamics": {
        "torque_error": "mean squared error of the torques on a new motion after the most steps down the learned loss",
        "LOSS_torque_STEPS": "mean squared error of the torques after so many steps down the learned loss (ml3), the "
        "error of the torques (mse), or that error at the rate tuned_rate (tuned)",
        "LOSS_inertia_STEPS": "mean squared error of the mass matrix after these steps",
        "tuned_rate": "rate at which the error of the torques is best descended on other motions",
    },
    "Car": {
        "reached": "share of new policies that reach the top after two updates by the learned loss",
        "LOSS_reached_UPDATES": "share of policies that reach the top after so many updates by the learned loss (ml3), "
        "by the task's own (task), or by the learned one from the policies of meta-training (same)",
        "LOSS_gap_UPDATES": "what the farthest position then lacks to the goal",
        "tuned_rate": "rate at which the task's own loss is best descended by other policies",
    },
    "Reaching": {
        "distance": "distance from new goals, in m, after two updates by the learned loss",
        "LOSS_distance_UPDATES": "distance from new goals, in m, after so many updates by the learned loss (ml3), by "
        "the task's own at the same rate (same), or by that at the rate tuned_rate (task)",
        "LOSS_loss_UPDATES": "the task's own loss after these updates",
        "tuned_rate": "rate at which the task's own loss is best descended for other goals",
    },
    "Digits": {
        "ml3_accuracy": "share of test images that are classified rightly after the most steps down the learned loss",
        "arch_LOSS_tuned_rate": "the rate of arch_LOSS_tuned_QUANTITY after the most steps",
        "arch_LOSS_tuned_QUANTITY_STEPS": "arch_LOSS_QUANTITY at the rate that is best for so many steps",
        "arch_LOSS_QUANTITY_STEPS": "accuracy or cross-entropy (loss) of a network of another kind than in training",
        "LOSS_tuned_QUANTITY_STEPS_train_pair": "LOSS_tuned_QUANTITY on the pairs of digits of training",
        "LOSS_QUANTITY_STEPS_train_pair": "LOSS_QUANTITY on the pairs of digits of training",
        "LOSS_tuned_QUANTITY_STEPS": "LOSS_QUANTITY at the rate that is best for so many steps on pairs of training",
        "LOSS_QUANTITY_STEPS": "accuracy or cross-entropy (loss) on test images of new pairs of digits, after so many "
        "steps of a fresh network down the learned loss (ml3) or the cross-entropy (ce)",
        "LOSS_tuned_rate": "the rate of LOSS_tuned_QUANTITY after the most steps",
    },
    "ModelFree": {
        "LOSS_return_UPDATES": "return at new goals after so many updates of a policy by the learned loss (ml3) or by "
        "PPO (ppo); 0 is a fresh policy",
        "ppo_rate": "step size that PPO was tuned to on training goals",
        "ppo_epochs": "passes over a batch that PPO was tuned to on training goals",
        "ppo_discount": "discount of later rewards that PPO was tuned to on training goals",
    },
    "Search": {
        "METHOD_late_reward": "mean reward of what a method proposed in the last rounds",
        "METHOD_early_reward": "mean reward of what a method proposed in the first rounds",
        "METHOD_reward": "mean reward of all that a method proposed",
        "METHOD_best": "mean reward of the ten best rules of a method",
        "children": "number of rules that a network was trained by",
        "proposals": "number of rules that were proposed",
        "duplicates": "share of the proposals that were proposed before",
        "seconds_per_child": "seconds that training a network by a rule took",
        "again_reward": "mean reward of the best rules, trained once more",
    },
    "Transfer": {
        "RULE_best_test": "score of the rule on test examples at the epoch that is best on them, over the starts",
        "RULE_best_valid": "score of the rule on validation examples at its best epoch, over the starts",
        "RULE_test": "score of the rule on test examples at the end of training, over the starts",
        "RULE_valid": "score of the rule on validation examples at the end of training, over the starts",
        "RULE_over_OTHER": "test score of the rule less that of the other, start by start",
        "RULE_rate": "rate of the rule, the best of a sweep on a start of its own",
        "RULE_bytes": "bytes of state that the rule keeps for a parameter",
        "RULE_first_epoch": "test score of the rule after one epoch from the first start, trained once more",
    },
    "OnJets": {
        "auc_train_HOW": "area under the ROC curve for W jets of the shower of training, adapted as HOW says",
        "auc_mean_HOW": "area under the ROC curve, the mean over all windows of transverse momentum; HOW is the "
        "supervision: none before adaptation, trained as in training, labels20 by 20 labelled jets of each class, "
        "proportions64 or mixture64 by bags of 64 unlabelled jets (over, under and drift: with wrong or other shares), "
        "window or likelihood for cuts without learning",
        "auc_WHERE_HOW": "area under the ROC curve in one window, named by its lower edge in GeV, or for other signals "
        "(wt, z, top) and another shower (vincia)",
        "rejection_WHERE_HOW": "one over the share of QCD jets that pass where half of the signal does",
        "rejectionSIZE_WHERE_HOW": "one over the share of QCD jets that pass where so many per cent of the signal do",
        "rate_HOW": "inner rate of this supervision, the best on validation tasks",
        "steps_HOW": "inner steps of this supervision, the best on validation tasks",
        "generous_auc_HOW": "area under the ROC curve with the rate and the steps that are best on the test tasks "
        "themselves",
    },
    "Matrix": {
        "auc_elsewhere_HOW": "area under the ROC curve, the mean over the cases in which a tagger is judged in another "
        "window than it was trained in; HOW is none, before adaptation, or labels",
        "auc_home_HOW": "area under the ROC curve, the mean over the cases in which both windows are the same",
        "auc_SIZE_SIZE_HOW": "area under the ROC curve of a tagger of one window, judged in another, both by their "
        "lower edges in GeV",
    },
    "Translation": {
        "cer_NAMES": "character error rate after adaptation on so many names, over all test languages",
        "cer_NAMES_language_CODE": "character error rate in one language",
        "cer_NAMES_GROUP": "character error rate in languages whose family training has seen, or not (held), and of "
        "names whose concepts it was shown in other languages, or not (new)",
        "exact_NAMES": "share of names that are right letter by letter after adaptation on so many names",
        "exact_NAMES_GROUP": "that share for families that training has seen, or not (held), and concepts that it was "
        "shown, or not (new)",
        "rate_NAMES": "rate of fine-tuning on so many names, the best on validation languages",
        "steps_NAMES": "steps of fine-tuning on so many names, the best on validation languages",
        "start_cer_CODE": "character error rate in one language before adaptation",
        "fixed_cer_CODE": "character error rate in one language after adaptation at the settings of the field fixed",
        "lost": "character error rate that is lost where the most names become the fewest",
    },
    "NestedExperiment": {
        "loss_ITERATIONS": "mean squared error on new families after so many iterations of MAML on each",
        "shifted_loss_ITERATIONS": "that error on families beyond the range of training",
        "iterations_to_LEVEL": "iterations until the error is below so many hundredths",
        "reached_LEVEL": "share of seeds that came below it",
        "picked_ITERATIONS": "which setting of the grid was best on validation families for so many iterations",
        "evaluations_order_ORDER": "losses that one seed's training evaluates at this order of derivatives",
        "seconds_training": "processor seconds of an iteration of training, of one seed",
        "seconds_new_family": "processor seconds of an iteration of MAML on a new family, of one seed",
    },
    "ParadigmExperiment": {
        "QUANTITY_before": "accuracy or mean squared error (mse) on test tasks before adaptation",
        "accuracy_SHOTS": "accuracy on test tasks with so many examples of each class",
        "mse_SHOTS": "mean squared error on test tasks with so many examples",
        "training_SHOTS": "loss on the support set, the mean over the first ten steps of adaptation",
        "steps_SHOTS": "steps of adaptation, the best on validation tasks",
        "rate_SHOTS": "rate of adaptation, the best on validation tasks",
        "gradients_SHOTS": "gradients of one example that adaptation to a task takes",
        "seconds_SHOTS": "processor seconds that adaptation to a task and its predictions take",
        "parameters": "number of meta-parameters",
        "accuracy_FAMILY": "accuracy on tasks of another family, with the shots of training",
        "mse_FAMILY": "mean squared error on tasks of another family, with the shots of training",
    },
    "Experiment": {
        "spot_NAME": "the metric of that name, measured in short: for points on the way and the check of records"
    },
}  # fmt: skip


class Metric(NamedTuple):
    """Metrics of one meaning.

    Attributes:
        pattern: what they are called; a word in capitals stands for a part that differs.
        names: those that there are, in the order of the record.
        values: by each word in capitals, what it stands for in these names.
        meaning: in words; empty where nobody has said it.
    """

    pattern: str
    names: list[str]
    values: dict[str, list[str]]
    meaning: str


def known(experiment: Experiment) -> dict[str, str]:
    """What metrics of this experiment can mean, by patterns of their names; those that fit nearly all stand last."""
    found: dict[str, str] = {}
    for kind in type(experiment).__mro__:
        for key in (f"{experiment.paper}.{kind.__name__}", kind.__name__):
            found |= {name: text for name, text in MEANINGS.get(key, {}).items() if name not in found}
    return dict(sorted(found.items(), key=lambda one: one[0][0].isupper()))


def described(experiment: Experiment, names: Iterable[str]) -> list[Metric]:
    """Metrics with their meanings, those of one pattern together.

    >>> from helpers.experiments import find
    >>> (both,) = described(find("maml-omniglot-5w1s"), ["inductive_accuracy_1", "inductive_accuracy_10"])
    >>> both.pattern, both.values, both.meaning
    ('inductive_accuracy_STEPS', {'STEPS': ['1', '10']}, 'accuracy after so many inner steps, each query seen alone')
    """
    meanings = known(experiment)
    expressions = {pattern: _expression(pattern) for pattern in meanings}
    found: dict[str, Metric] = {}
    for name in names:
        matches = ((pattern, match) for pattern, one in expressions.items() if (match := one.fullmatch(name)))
        pattern, match = next(matches, (name, None))
        metric = found.setdefault(pattern, Metric(pattern, [], {}, meanings.get(pattern, "")))
        metric.names.append(name)
        for word, value in zip(re.findall("[A-Z]+", pattern), match.groups() if match else (), strict=False):
            if value not in metric.values.setdefault(word, []):
                metric.values[word].append(value)
    return list(found.values())


def _expression(pattern: str) -> re.Pattern[str]:
    """What fits a pattern, with a group for each word in capitals."""
    return re.compile(re.sub(r"[A-Z]+", lambda word: r"(\d+)" if word[0] in NUMBERS else r"(\w+?)", pattern))
