package service

import (
	"context"
	"slices"
	"testing"
	"time"

	"cloud.google.com/go/compute/metadata"
	"golang.org/x/oauth2/google"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube"
)

// Google's own Go libraries, as they come, against the emulator (C-GO-1, C-GO-3). They ask from
// 127.0.0.1.
func TestGoClients(t *testing.T) {
	b := newTestNode(t)
	b.addPod("go", "127.0.0.1", map[string]string{"iam.gke.io/gcp-service-account": gsa})
	b.google.Allow("system:serviceaccount:default:go", gsa)
	b.ready(t)
	b.eventually(t, "the pod is known", func() bool { // until then its address is the node's alone, which is refused
		c := b.Status().Cluster
		return c != nil && slices.ContainsFunc(c.Pods, func(p kube.PodStatus) bool { return p.Name == "go" })
	})
	t.Setenv("HOME", t.TempDir()) // whoever runs this may have credentials of their own
	t.Setenv("GOOGLE_APPLICATION_CREDENTIALS", "")
	t.Setenv("GCE_METADATA_HOST", b.listener.Addr().String()) // H-16: our own address as Host
	ctx := t.Context()

	if !metadata.OnGCEWithContext(ctx) {
		t.Error("OnGCE is false")
	}
	for name, ask := range map[string]struct {
		get  func() (string, error)
		want string
	}{
		"ProjectID":        {func() (string, error) { return metadata.ProjectIDWithContext(ctx) }, "my-project"},
		"NumericProjectID": {func() (string, error) { return metadata.NumericProjectIDWithContext(ctx) }, "123456789012"},
		"Email":            {func() (string, error) { return metadata.EmailWithContext(ctx, "default") }, gsa},
		"InstanceID":       {func() (string, error) { return metadata.InstanceIDWithContext(ctx) }, "4503599627370497"},
		"Zone":             {func() (string, error) { return metadata.ZoneWithContext(ctx) }, "europe-west4-a"},
		"Hostname":         {func() (string, error) { return metadata.HostnameWithContext(ctx) }, "node1.example.com"},
		"cluster-name": {func() (string, error) {
			return metadata.InstanceAttributeValueWithContext(ctx,
				"cluster-name")
		}, "my-cluster"},
		"universe": {func() (string, error) { return metadata.GetWithContext(ctx, "universe/universe-domain") },
			"googleapis.com"},
	} {
		if got, err := ask.get(); err != nil || got != ask.want {
			t.Errorf("%s: %q, %v; want %q", name, got, err, ask.want)
		}
	}
	_, err := metadata.GetWithContext(ctx, "instance/name")
	if _, ok := err.(metadata.NotDefinedError); !ok {
		t.Errorf("E-12: %v", err)
	}

	credentials, err := google.FindDefaultCredentials(ctx, "https://www.googleapis.com/auth/devstorage.read_only")
	if err != nil {
		t.Fatal(err)
	}
	got, err := credentials.TokenSource.Token()
	if err != nil {
		t.Fatal(err)
	}
	issued, ok := b.google.Lookup(got.AccessToken)
	if !ok || issued.Email != gsa || len(issued.Scopes) != 1 ||
		issued.Scopes[0] != "https://www.googleapis.com/auth/devstorage.read_only" {
		t.Errorf("x/oauth2 got the token of %q for %v", issued.Email, issued.Scopes)
	}
	if until := time.Until(got.Expiry); until < 30*time.Minute || until > time.Hour {
		t.Errorf("it expires in %v", until)
	}

	// H-12: Subscribe sees the value, then its change, and does not spin between the two.
	seen := make(chan string, 100)
	done := make(chan error, 1)
	go func() {
		done <- metadata.SubscribeWithContext(ctx, "instance/machine-type", func(_ context.Context, v string, ok bool) error {
			seen <- v
			if v == "projects/1/machineTypes/e2-micro" {
				return context.Canceled // enough
			}
			return nil
		})
	}()
	if v := receive(t, seen); v != "projects/1/machineTypes/n2-standard-4" {
		t.Errorf("Subscribe: %q", v)
	}
	b.replace(t, "config.yaml", "machineTypes/n2-standard-4", "machineTypes/e2-micro")
	b.hangUp()
	if v := receive(t, seen); v != "projects/1/machineTypes/e2-micro" {
		t.Errorf("Subscribe, after the change: %q", v)
	}
	if err := receive(t, done); err != context.Canceled {
		t.Errorf("Subscribe: %v", err)
	}
}
