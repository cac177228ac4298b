"""A step of one row: its permutation is the identity."""

import torch

from scx.audit.interface import About, Attack, Budget, Claim, Knowledge, Outcome
from scx.audit.matching import Reading, hidden_of, nearest, search
from scx.audit.views import View


class BatchOfOne(Attack):
    """A request that decodes alone sends one row per step: the layer's input, in clear.

    Compares it with the whole vocabulary in layer 0. In deeper layers it compares the
    states of candidates after the text so far, which it is given.

    Source: measured in this project; matching as in Hidden No More (arXiv 2505.18332).
    """

    name = "batch of one"
    adversary = "A2"
    given_text = True

    def run(self, knowledge: Knowledge, view: View, budget: Budget) -> Outcome:
        singles = [
            (index, step, step.request)
            for index, step in enumerate(view.steps)
            if step.request is not None and len(step.rows) == 1
        ]
        if not singles:
            return Outcome({}, "no step of one row was recorded")
        if view.layer == 0:
            rows = torch.cat([step.rows for _, step, _ in singles])
            tokens = nearest(rows, knowledge.model.table)
            claims = [
                Claim(About.STEP_TOKENS, index, token[None])
                for (index, _, _), token in zip(singles, tokens, strict=True)
            ]
            return Outcome({"": claims})
        claims = []
        for index, step, request in singles:
            position = int(step.positions[0])
            target = step.rows.new_zeros(position + 1, step.rows.shape[1])
            target[position] = step.rows[0]
            known = knowledge.plaintext.prefix(request, position)
            token = search(knowledge.model, Reading(hidden_of, target), known, budget)
            if not len(token):
                break
            claims.append(Claim(About.STEP_TOKENS, index, token))
        cut = (
            f"{len(claims)} of {len(singles)} steps" if len(claims) < len(singles) else ""
        )
        return Outcome({"": claims}, cut)
