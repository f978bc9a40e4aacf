package routing

import (
	"strings"
	"testing"
	"time"
)

func TestCloudServer(t *testing.T) {
	start := time.Unix(1000, 0)
	for _, c := range []struct {
		name    string
		answers []string // one every two minutes
		want    string
	}{
		{"answers", []string{cloudAnswers}, cloudAnswers},
		{"refuses", []string{cloudNone}, cloudNone},
		{"no network", []string{cloudUnknown}, cloudUnknown},
		{"the network comes up", []string{cloudUnknown, cloudSilent, cloudAnswers}, cloudAnswers},
		{"silent once", []string{cloudSilent}, cloudSilent},
		{"silent, and asked again too soon", []string{cloudSilent, cloudSilent, cloudSilent}, cloudSilent},
		{"silent for a while, and then it answers", []string{cloudSilent, cloudSilent, cloudAnswers}, cloudAnswers},
		{"silent for a while", []string{cloudSilent, cloudSilent, cloudSilent, cloudSilent}, cloudNone},
		{"known once and for all", []string{cloudAnswers, cloudSilent, cloudSilent, cloudSilent, cloudNone}, cloudAnswers},
		{"none, and then our own rules answer", []string{cloudNone, cloudAnswers}, cloudNone},
	} {
		var known CloudServer
		for i, found := range c.answers {
			known = known.with(found, start.Add(time.Duration(i)*2*time.Minute))
		}
		if known.Found != c.want {
			t.Errorf("%s: %q, want %q", c.name, known.Found, c.want)
		}
	}
}

func TestHostPodsDecision(t *testing.T) {
	if yes, why := hostPods(Plan{Mode: ModeLoopback, InterceptHostPods: "auto"}, CloudServer{Found: cloudNone},
		[]string{"system.slice"}); yes ||
		why != "left alone: mode loopback redirects nobody" {
		t.Errorf("mode loopback: %v, %s", yes, why)
	}
	slices := []string{"system.slice"}
	for _, c := range []struct {
		intercept, found string
		slices           []string
		want             bool
		why              string
	}{
		{"on", cloudAnswers, slices, true, "redirected: routing.interceptHostPods is on"},
		{"off", cloudNone, slices, false, "left alone: routing.interceptHostPods is off"},
		{"", cloudNone, slices, false, "is off"},
		{"auto", cloudNone, slices, true, "redirected: no metadata server"},
		{"auto", cloudAnswers, slices, false, "they may need it"},
		{"auto", cloudSilent, slices, true, "no metadata server of a cloud has answered at 169.254.169.254 so far"},
		{"auto", cloudUnknown, slices, false, "no route to 169.254.169.254 yet"},
		{"on", cloudUnknown, nil, false, "left alone: none of the host's own cgroups was found"},
		{"auto", cloudNone, nil, false, "needs cgroup v2"},
	} {
		yes, why := hostPods(Plan{Mode: ModeEBPF, InterceptHostPods: c.intercept}, CloudServer{Found: c.found}, c.slices)
		if yes != c.want || !strings.Contains(why, c.why) {
			t.Errorf("%s, %q: %v, %s; want %v, %s", c.intercept, c.found, yes, why, c.want, c.why)
		}
	}
}
