package server

// Values of the label reason that are used outside the table refusals.
const (
	reasonRequest      = "request"      // its method, header or query is not what a metadata server takes
	reasonPassthrough  = "passthrough"  // it is for another cloud's metadata server
	reasonUnconfigured = "unconfigured" // there is no configuration
	reasonLimit        = "limit"        // the pod has as much as limits.* allows
)

// everyReason returns all values that reasonOf may return, some of them several times.
func everyReason() []string {
	all := []string{reasonRequest, reasonPassthrough, reasonUnconfigured}
	for _, r := range refusals {
		all = append(all, r.label)
	}
	return all
}

// reasonOf returns the label reason of a request that was refused.
func reasonOf(req *request, err error) string {
	switch r := refusalOf(err); {
	case r.Label != "":
		return r.Label
	case req.foreign:
		return reasonPassthrough
	}
	return reasonRequest
}
