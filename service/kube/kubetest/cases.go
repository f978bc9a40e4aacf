package kubetest

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

//go:embed testdata/answers.txt
var answers string

// CaseAudience is what the cases call X.
const CaseAudience = "//iam.googleapis.com/projects/123/locations/global/workloadIdentityPools/pool/providers/prov"

// Case is one question and its answer, as the real server gave it. The same cases run against this
// server and, by `make test-kube`, against the real one: that is what entitles tests to believe
// this one.
type Case struct {
	Identity  string // node, node+audience (with the grant of N-05 for X), dedicated
	Ask, Want string
}

// Cases returns the table.
func Cases() []Case {
	var cs []Case
	identity := ""
	for _, line := range strings.Split(answers, "\n") {
		switch {
		case strings.HasPrefix(line, "## "):
			identity = line[3:]
		case strings.Contains(line, "=>") && !strings.HasPrefix(line, "#"):
			ask, want, _ := strings.Cut(line, "=>")
			cs = append(cs, Case{identity, strings.TrimSpace(ask), strings.TrimSpace(want)})
		}
	}
	return cs
}

// Populate makes the world that the cases speak of, with node1's kubelet and the dedicated
// identity's token.
func (s *Server) Populate(dedicatedToken string) error {
	for _, sa := range CaseServiceAccounts() {
		s.SetServiceAccount(sa.Namespace, sa.Name, sa.Annotations)
	}
	for _, p := range CasePods() {
		s.SetPod(p)
	}
	s.AddUser("gke-metadata-emulator", dedicatedToken)
	_, err := s.NodeCert("node1")
	return err
}

// CaseServiceAccounts are the ServiceAccounts of that world.
func CaseServiceAccounts() []*corev1.ServiceAccount {
	var sas []*corev1.ServiceAccount
	for _, name := range []string{"default", "ksa", "ksa-node2", "ksa-unused", "ksa-node1b"} {
		sas = append(sas, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: "ns1", Name: name,
			Annotations: map[string]string{"iam.gke.io/gcp-service-account": name + "@p.iam.gserviceaccount.com"}}})
	}
	return sas
}

// CasePods are the pods of that world.
func CasePods() []Pod {
	return []Pod{
		{Namespace: "ns1", Name: "p1", Node: "node1", ServiceAccount: "ksa", Addresses: []string{"10.1.0.11"}},
		{Namespace: "ns1", Name: "p1-proj", Node: "node1", ServiceAccount: "ksa", Addresses: []string{"10.1.0.12"},
			Audiences: []string{"proj-aud"}},
		{Namespace: "ns1", Name: "p1b", Node: "node1", ServiceAccount: "ksa-node1b", Addresses: []string{"10.1.0.13"}},
		{Namespace: "ns1", Name: "p1-succeeded", Node: "node1", ServiceAccount: "ksa-node1b",
			Addresses: []string{"10.1.0.14"}, Phase: "Succeeded", Ended: true},
		{Namespace: "ns1", Name: "p2", Node: "node2", ServiceAccount: "ksa-node2", Addresses: []string{"10.2.0.11"}},
		{Namespace: "ns1", Name: "p2-same-ksa", Node: "node2", ServiceAccount: "ksa", Addresses: []string{"10.2.0.12"}},
	}
}

// Target is where cases are asked: a server, as one identity.
type Target struct {
	URL    string
	Issuer string // what the cases call API
	Client *http.Client
	Token  string                             // bearer; "" = the client has a certificate
	UID    func(namespace, pod string) string // of a pod that was made
}

// Answer asks and returns the answer in the table's words.
func (c Case) Answer(ctx context.Context, t Target) (string, error) {
	f := strings.Fields(c.Ask)
	if len(f) < 2 {
		return "", fmt.Errorf("kubetest: case %q: want VERB OBJECT [KEY=VALUE…]", c.Ask)
	}
	args := map[string]string{}
	for _, a := range f[2:] {
		k, v, _ := strings.Cut(a, "=")
		args[k] = v
	}
	method, path, body := http.MethodGet, f[1], []byte(nil)
	if !strings.HasPrefix(path, "/") {
		if ns, rest, is := strings.Cut(path, "/"); is && ns == "ns1" {
			path = "namespaces/" + ns + "/" + rest
			if f[0] == "token" {
				path = "namespaces/" + ns + "/serviceaccounts/" + rest + "/token"
			}
		}
		path = "/api/v1/" + path
	}
	q := url.Values{}
	if s := args["fields"]; s != "" {
		q.Set("fieldSelector", s)
	}
	switch f[0] {
	case "watch":
		q.Set("watch", "true")
		q.Set("timeoutSeconds", "1")
	case "token":
		method = http.MethodPost
		body = tokenRequest(t, args)
	}
	r, err := http.NewRequestWithContext(ctx, method, t.URL+path+"?"+q.Encode(), bytes.NewReader(body))
	if err != nil {
		return "", err
	}
	r.Header.Set("Accept", "application/json")
	r.Header.Set("Content-Type", "application/json")
	if t.Token != "" {
		r.Header.Set("Authorization", "Bearer "+t.Token)
	}
	resp, err := t.Client.Do(r)
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }() // read only
	if f[0] == "watch" && resp.StatusCode == http.StatusOK {
		return "200", nil // its events are other tests' business
	}
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", err
	}
	return c.render(resp.StatusCode, b, f[0], t), nil
}

func (c Case) render(code int, b []byte, verb string, t Target) string {
	head := fmt.Sprint(code)
	if strings.Contains(c.Ask, " /") {
		return head // what is said there is not part of the API's promise
	}
	var o struct {
		Message  string
		Items    *[]json.RawMessage
		Metadata struct{ Annotations map[string]string }
		Status   json.RawMessage
		Kind     string
	}
	if err := json.Unmarshal(b, &o); err != nil {
		return head + " " + err.Error()
	}
	short := strings.NewReplacer(CaseAudience, "X", t.Issuer, "API")
	switch {
	case code >= 400:
		return head + " " + short.Replace(o.Message)
	case verb == "token":
		return head + " " + short.Replace(describe(o.Status))
	case o.Items != nil && strings.Contains(c.Want, "items"):
		return fmt.Sprintf("%s %d items", head, len(*o.Items))
	case len(o.Metadata.Annotations) > 0 && strings.Contains(c.Ask, "serviceaccounts"):
		return fmt.Sprint(head, " ", o.Metadata.Annotations)
	}
	return head
}

func tokenRequest(t Target, args map[string]string) []byte {
	spec := map[string]any{}
	if a := args["aud"]; a != "" {
		spec["audiences"] = strings.Split(strings.ReplaceAll(a, "X", CaseAudience), ",")
	} else {
		spec["audiences"] = nil
	}
	if e := args["exp"]; e != "" {
		spec["expirationSeconds"] = json.Number(e)
	}
	bound := map[string]string{"apiVersion": "v1", "kind": "Pod", "name": args["pod"]}
	switch args["uid"] {
	case "wrong":
		bound["uid"] = "00000000-0000-0000-0000-000000000000"
	case "":
		bound["uid"] = t.UID("ns1", args["pod"])
	}
	if n := args["node"]; n != "" {
		bound = map[string]string{"apiVersion": "v1", "kind": "Node", "name": n}
	}
	if bound["name"] != "" {
		spec["boundObjectRef"] = bound
	}
	b, err := json.Marshal(map[string]any{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec})
	if err != nil {
		panic(fmt.Sprintf("kubetest: %v", err)) // strings
	}
	return b
}

// describe says what matters of a token, and nothing of its value.
func describe(status json.RawMessage) string {
	var st struct{ Token string }
	if err := json.Unmarshal(status, &st); err != nil {
		return err.Error()
	}
	parts := strings.Split(st.Token, ".")
	if len(parts) != 3 {
		return "not a JWT"
	}
	b, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return "not a JWT"
	}
	var c struct {
		Sub      string
		Aud      []string
		Iat, Exp int64
		K        struct {
			Pod, Node *struct{ Name, UID string }
			Warnafter int64
		} `json:"kubernetes.io"`
	}
	if err := json.Unmarshal(b, &c); err != nil {
		return "not a ServiceAccount's JWT"
	}
	s := fmt.Sprintf("sub=%s aud=%s seconds=%d", c.Sub, strings.Join(c.Aud, ","), c.Exp-c.Iat)
	if c.K.Pod != nil {
		s += " pod=" + c.K.Pod.Name
	}
	if c.K.Node != nil {
		s += " node=" + c.K.Node.Name
	}
	if c.K.Warnafter != 0 {
		s += fmt.Sprintf(" warnafter=%d", c.K.Warnafter-c.Iat)
	}
	return s
}
