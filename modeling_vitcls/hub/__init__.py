"""What goes to the Hub, and whether it arrived.

    card.py             the model card, in several files: card_*.py, licences.py
    encoder_card.py     that of a pre-trained encoder; conversion_card.py: of a converted model
    checkpoint_card.py  that of a model in training; published_card.py: any card under the repository's name
    origin.py           where a model comes from, and its licence
    places.py           which names are paths of this machine; samples.py: whose pictures a card shows
    energy.py           an estimate of the energy of a run
    loading.py          from a name to a folder with the model; timm_models.py: the same for timm
    rights.py           may this token push there? Asked before training, without a trace
    contents.py         which files of a model folder are published; resumable.py: what --resume needs, on request
    publish.py          the push: one commit, tried again where the network fails
    verify.py           the proof: a fresh process loads the commit and answers as the model does
    fresh_process.py    starts that process; clean_process.py: what runs in it; reference.py: what it is compared with
    commits.py          which commit a name on the Hub stands for
    code_elsewhere.py   one copy of the code, in a repository of its own, for many models
    space.py            a page where anyone can try a model
    connection.py       what the others share of talking to the Hub

Nothing here ships to the Hub itself.
"""
