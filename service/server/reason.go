package server

// Reasons that are no row of refusals, or several.
const (
	reasonRequest      = "request"      // its method, header or query is not what a metadata server takes
	reasonPassthrough  = "passthrough"  // it is for another cloud's metadata server
	reasonUnconfigured = "unconfigured" // there is no configuration
	reasonLimit        = "limit"        // the pod has as much as limits.* allows
	reasonOther        = "other"
)

// everyReason returns all values that reasonOf may return.
func everyReason() []string {
	all := []string{reasonRequest, reasonPassthrough, reasonUnconfigured, reasonLimit, reasonOther}
	for _, r := range refusals {
		all = append(all, r.reason)
	}
	return all
}

// reasonOf returns why the request was refused.
func reasonOf(req *request, err error) string {
	switch r := refusalOf(err); {
	case r.Metric != "":
		return r.Metric
	case req.foreign:
		return reasonPassthrough
	}
	return reasonRequest
}
