package server

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/metadata"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// The table of refusals, row by row (T-07, T-09, H-22). What clients must not give up on is a 5xx
// (T-09).
func TestRefusals(t *testing.T) {
	google := func(step string, status int) error {
		return &token.GoogleError{Step: step, Status: status, Message: "m"}
	}
	for name, tt := range map[string]struct {
		err    error
		status int
		retry  bool
	}{
		"pod not known yet":          {attest.ErrUnknown, 503, true},
		"two pods":                   {attest.ErrAmbiguous, 503, true},
		"the address changed hands":  {attest.ErrChanged, 503, true},
		"not a pod":                  {attest.ErrNotPod, 403, false},
		"A-12: a neighbour's socket": {attest.ErrSockets, 503, true},
		"API server away":            {&kube.AwayError{Since: time.Now(), Err: errors.New("x")}, 503, false},
		"no kubeconfig":              {kube.ErrNotConfigured, 503, false},
		"TokenRequest refused": {&kube.ForbiddenError{Verb: "create", Resource: "serviceaccounts/token"}, 503,
			false},
		"the pod went away":          {kube.ErrNoPod, 503, false},
		"STS 400":                    {google("STS", 400), 403, false},
		"STS 401":                    {google("STS", 401), 403, false},
		"IAM 400":                    {google("IAM", 400), 400, false},
		"IAM 401, after another try": {google("IAM", 401), 503, false},
		"IAM 403":                    {google("IAM", 403), 403, false},
		"IAM 404":                    {google("IAM", 404), 404, false},
		"Google 429":                 {google("STS", 429), 503, false},
		"Google 500":                 {google("IAM", 500), 503, false},
		"unreachable":                {token.ErrUnavailable, 503, false},
		"over a limit":               {&token.LimitError{Limit: "keysPerPod", Value: 64}, 503, true},
		"bad annotation": {&kube.AnnotationError{ServiceAccount: workload.ServiceAccount{Namespace: "a",
			Name: "b"}, Key: "k"}, 400, false},
		"no such name":                    {metadata.ErrNotFound, 404, false},
		"bad query":                       {metadata.BadQuery("alt=%s", "xml"), 400, false},
		"not linked":                      {errNotLinked, 404, false},
		"no audience":                     {errNoAudience, 400, false},
		"something nobody has thought of": {errors.New("?"), 503, false},
	} {
		t.Run(name, func(t *testing.T) {
			got := refusalOf(fmt.Errorf("while testing: %w", tt.err))
			if got.Status != tt.status || got.Retry != tt.retry || got.Text == "" {
				t.Errorf("%+v, want %d, retry %v", got, tt.status, tt.retry)
			}
		})
	}
	if r := refusalOf(attest.ErrNoSocket); !strings.Contains(r.Text, "ServiceAccount in attestation.byAddress") {
		t.Errorf("A-14: no way out for containers that a pod runs itself: %q", r.Text)
	}
	if r := refusalOf(metadata.ErrNotFound); r.Text != "Not Found" {
		t.Errorf("H-15: %q", r.Text)
	}
	if r := refusalOf(fmt.Errorf("x: %w",
		refusal{Status: http.StatusTeapot, Text: "as it is"})); r.Status != http.StatusTeapot || r.Text != "as it is" {
		t.Errorf("%+v", r)
	}
}

// A pod is told nothing of others: not what the errors of attest name for the log, nor what nobody
// has thought of. No sentinel is forgotten.
func TestRefusalsNameNobody(t *testing.T) {
	const others = "pod 11111111-2222 of ns/victim in /kubepods/pod11111111-2222/c0ffee and network namespace " +
		"4026531840 at 10.9.8.7"
	sentinels := map[string]error{
		"ErrUnknown": attest.ErrUnknown, "ErrAmbiguous": attest.ErrAmbiguous, "ErrNotPod": attest.ErrNotPod,
		"ErrNoAccount": attest.ErrNoAccount,
		"ErrReplaced":  attest.ErrReplaced, "ErrChanged": attest.ErrChanged, "ErrNoNamespace": attest.ErrNoNamespace,
		"ErrHelperAway": attest.ErrHelperAway,
		"ErrNoSocket":   attest.ErrNoSocket, "ErrUnknownCgroup": attest.ErrUnknownCgroup, "ErrSockets": attest.ErrSockets,
		"ErrNoCgroup": attest.ErrNoCgroup,
		"ErrSpared":   attest.ErrSpared, "ErrEmptyCgroup": attest.ErrEmptyCgroup, "ErrOwner": attest.ErrOwner,
		"ErrPods":           attest.ErrPods,
		"ErrNamespaceOwner": attest.ErrNamespaceOwner, "ErrOtherNamespace": attest.ErrOtherNamespace,
		"ErrNotRead": attest.ErrNotRead,
		"":           errors.New("netlink"),
	}
	var all []string
	files, err := filepath.Glob("../attest/*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`(?m)^\t(Err\w+) += errors\.New`).FindAllSubmatch(text, -1) {
			all = append(all, string(m[1]))
		}
	}
	if len(all) != len(sentinels)-1 {
		t.Errorf("attest has %d sentinels, and %d are tried here", len(all), len(sentinels)-1)
	}
	sentinels["kube.ErrNoPod"] = kube.ErrNoPod // whose text may be about another pod of the ServiceAccount
	for _, name := range append(all, "", "kube.ErrNoPod") {
		if sentinels[name] == nil {
			t.Errorf("%s is not tried", name)
			continue
		}
		r := refusalOf(fmt.Errorf("%w: %s", sentinels[name], others))
		for _, word := range strings.Fields(others) {
			if strings.ContainsAny(word, "0123456789/") && strings.Contains(r.Text, word) {
				t.Errorf("%s: the pod is told of %s: %s", name, word, r.Text)
			}
		}
	}
}
