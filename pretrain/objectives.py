"""The objectives (paper, eq. 2, 4-6), each a function of the networks, the views and beta.

``weak`` and ``aggressive`` are float [B, 2, 3, H, W]. Every function returns ``loss`` (a scalar to minimise) and,
detached, what is worth watching: the two parts of the loss, mean cosines, and ``feature_std``, the standard deviation
of the normalised predictions over the batch times sqrt(dim): about 1 when healthy, 0 when collapsed.
"""

import torch
import torch.nn.functional as F


def distance(q, z):
    """d(q, z) = 2 - 2 cos(q, z) (eq. 2): [B, D] x 2 -> [B], in float32 at least, whatever autocast gave."""
    q, z = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, z))
    return 2 - 2 * F.cosine_similarity(q, z, dim=1)


def rsa(networks, weak, aggressive, beta):
    """RSA (eq. 4-5), both directions: the aggressive view predicts the other weak view's target projection and, with
    weight beta, the other aggressive view's online prediction under stop-gradient."""
    q, q_ = networks.predict(aggressive[:, 0]), networks.predict(aggressive[:, 1])
    z, z_ = networks.project_target(weak[:, 0]), networks.project_target(weak[:, 1])
    loss_aw = (distance(q, z_) + distance(q_, z)).mean()
    loss_aa = (distance(q, q_.detach()) + distance(q_, q.detach())).mean()
    return {"loss": (1 - beta) * loss_aw + beta * loss_aa, **watch(q, q_, loss_aw=loss_aw, loss_aa=loss_aa)}


def byol(networks, weak, aggressive, beta):
    """BYOL on two aggressive views (AA), symmetrised. beta is not used."""
    loss, q, q_ = symmetric_byol(networks, aggressive[:, 0], aggressive[:, 1])
    return {"loss": loss, **watch(q, q_, loss_aa=loss)}


def byol_aw(networks, weak, aggressive, beta):
    """BYOL on an aggressive and a weak view (AW), symmetrised. beta is not used."""
    loss, q, q_ = symmetric_byol(networks, aggressive[:, 0], weak[:, 1])
    return {"loss": loss, **watch(q, q_, loss_aw=loss)}


METHODS = {"rsa": rsa, "byol": byol, "byol_aw": byol_aw}


def symmetric_byol(networks, view, view_):
    q, q_ = networks.predict(view), networks.predict(view_)
    z, z_ = networks.project_target(view), networks.project_target(view_)
    return (distance(q, z_) + distance(q_, z)).mean(), q, q_


def watch(q, q_, **parts):
    """Detached figures; a part d + d' has the mean cosine 1 - part / 4."""
    figures = {name: part.detach() for name, part in parts.items()}
    figures |= {name.replace("loss", "cos"): 1 - part / 4 for name, part in figures.items()}
    with torch.no_grad():
        features = F.normalize(torch.cat([q, q_]).float(), dim=1)
        figures["feature_std"] = features.std(0).mean() * features.shape[1] ** 0.5
    return figures
