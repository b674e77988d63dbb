"""One file per preconditioning method, and what these share.

To read in this order:

    base                  what a preconditioner is
    diagonal              SGD, AdaGrad, RMSprop, Adam, AdaGrad by rows
    axes, checks          which axes have a factor, and which options are refused
    batches               what a solver is given, and gives back
    factor_matrices       one root or basis per factor, made anew when due
    readiness             which of these have been made once
    grafted               blocks that another method gives their length
    shampoo               stored roots; with `roots`, what is done before and behind a solver
    eigenbases            how a solver is asked for bases
    basis_change, turns   what becomes of averages when a basis turns
    eigenvalue_corrected  SOAP
    kl, kl_soap           whitened factors, kept by `kl_factors`
    per_factor            an old basis, the eigenvalues of today
    spectral              Muon
    parts                 a method for some stacks, Adam for the others
"""
