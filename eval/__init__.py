if __name__ != "fewstep.eval":
    raise ImportError("import fewstep.eval, not eval: this folder is mapped into the fewstep package")
