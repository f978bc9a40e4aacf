package main

import (
	"context"
	"encoding/json"
	"errors"
	"strconv"
	"sync"

	"cloud.google.com/go/auth"
	"cloud.google.com/go/auth/credentials"
	"cloud.google.com/go/auth/credentials/idtoken"
	"cloud.google.com/go/compute/metadata"
	"cloud.google.com/go/storage"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	registry "github.com/google/go-containerregistry/pkg/v1/google"
	"go.opentelemetry.io/contrib/detectors/gcp"
	"go.opentelemetry.io/otel/attribute"
	"golang.org/x/oauth2/google"
	"google.golang.org/api/option"
)

const cloudPlatform = "https://www.googleapis.com/auth/cloud-platform"

type asks = map[string]func(context.Context) (string, error)

// computeMetadata is the client of the metadata server on which the others are built. It keeps no
// token.
func computeMetadata(string) library {
	token := func(ctx context.Context, path string) (string, error) {
		text, err := metadata.GetWithContext(ctx, "instance/service-accounts/default/"+path)
		if err != nil {
			return "", err
		}
		var got struct {
			AccessToken string `json:"access_token"`
		}
		return got.AccessToken, errors.Join(json.Unmarshal([]byte(text), &got))
	}
	return library{"cloud.google.com/go/compute/metadata", asks{
		"detect": func(ctx context.Context) (string, error) {
			return strconv.FormatBool(metadata.OnGCEWithContext(ctx)), nil
		},
		"scoped":  func(ctx context.Context) (string, error) { return token(ctx, "token?scopes="+scope) },
		"email":   func(ctx context.Context) (string, error) { return metadata.EmailWithContext(ctx, "default") },
		"project": metadata.ProjectIDWithContext,
		"token":   func(ctx context.Context) (string, error) { return token(ctx, "token") },
		"id": func(ctx context.Context) (string, error) {
			return metadata.GetWithContext(ctx, "instance/service-accounts/default/identity?format=full&audience="+audience)
		},
		"universe": func(ctx context.Context) (string, error) {
			return metadata.GetWithContext(ctx, "universe/universe-domain")
		},
	}}
}

// oauth2Google is golang.org/x/oauth2/google.
func oauth2Google(string) library {
	credentials := func(scope string) func() (*google.Credentials, error) {
		return sync.OnceValues(func() (*google.Credentials, error) {
			return google.FindDefaultCredentials(context.Background(), scope)
		})
	}
	token := func(find func() (*google.Credentials, error)) func(context.Context) (string, error) {
		return func(context.Context) (string, error) {
			c, err := find()
			if err != nil {
				return "", err
			}
			t, err := c.TokenSource.Token()
			if err != nil {
				return "", err
			}
			return t.AccessToken, nil
		}
	}
	usual := credentials(cloudPlatform)
	return library{"golang.org/x/oauth2", asks{
		"detect": func(context.Context) (string, error) { _, err := usual(); return yes(err) },
		"token":  token(usual),
		"scoped": token(credentials(scope)),
		"project": func(context.Context) (string, error) {
			c, err := usual()
			if err != nil {
				return "", err
			}
			return c.ProjectID, nil
		},
		"universe": func(context.Context) (string, error) {
			c, err := usual()
			if err != nil {
				return "", err
			}
			return c.GetUniverseDomain()
		},
	}}
}

// cloudAuth is cloud.google.com/go/auth.
func cloudAuth(string) library {
	detect := func(scope string) func() (*auth.Credentials, error) {
		return sync.OnceValues(func() (*auth.Credentials, error) {
			return credentials.DetectDefault(&credentials.DetectOptions{Scopes: []string{scope}})
		})
	}
	id := sync.OnceValues(func() (*auth.Credentials, error) {
		return idtoken.NewCredentials(&idtoken.Options{Audience: audience})
	})
	token := func(find func() (*auth.Credentials, error)) func(context.Context) (string, error) {
		return func(ctx context.Context) (string, error) {
			c, err := find()
			if err != nil {
				return "", err
			}
			t, err := c.Token(ctx)
			if err != nil {
				return "", err
			}
			return t.Value, nil
		}
	}
	property := func(c *auth.Credentials, err error, get func(*auth.Credentials) (string, error)) (string, error) {
		if err != nil {
			return "", err
		}
		return get(c)
	}
	usual := detect(cloudPlatform)
	return library{"cloud.google.com/go/auth", asks{
		"detect": func(context.Context) (string, error) { _, err := usual(); return yes(err) },
		"token":  token(usual),
		"scoped": token(detect(scope)),
		"id":     token(id),
		"project": func(ctx context.Context) (string, error) {
			c, err := usual()
			return property(c, err, func(c *auth.Credentials) (string, error) { return c.ProjectID(ctx) })
		},
		"universe": func(ctx context.Context) (string, error) {
			c, err := usual()
			return property(c, err, func(c *auth.Credentials) (string, error) { return c.UniverseDomain(ctx) })
		},
	}}
}

// cloudStorage is the client of Cloud Storage. The ring's Cloud Storage answers with the token of
// the request as the name of the bucket.
func cloudStorage(endpoint string) library {
	dial := func(scope string) func() (*storage.Client, error) {
		return sync.OnceValues(func() (*storage.Client, error) {
			return storage.NewClient(context.Background(), option.WithEndpoint(endpoint), option.WithScopes(scope))
		})
	}
	token := func(client func() (*storage.Client, error)) func(context.Context) (string, error) {
		return func(ctx context.Context) (string, error) {
			c, err := client()
			if err != nil {
				return "", err
			}
			attrs, err := c.Bucket("bucket").Attrs(ctx)
			if err != nil {
				return "", err
			}
			return attrs.Name, nil
		}
	}
	usual := dial(cloudPlatform)
	return library{"cloud.google.com/go/storage", asks{
		"detect": func(context.Context) (string, error) { _, err := usual(); return yes(err) },
		"token":  token(usual),
		"scoped": token(dial(scope)),
	}}
}

// registryKeychain is go-containerregistry's keychain with credentials for Google's registries.
func registryKeychain(string) library {
	resolve := func(ctx context.Context) (authn.Authenticator, error) {
		r, err := name.NewRegistry("europe-docker.pkg.dev")
		if err != nil {
			return nil, err
		}
		a, err := registry.Keychain.Resolve(r)
		if err == nil && a == authn.Anonymous {
			err = errors.New("anonymous")
		}
		return a, err
	}
	return library{"github.com/google/go-containerregistry", asks{
		"detect": func(ctx context.Context) (string, error) { _, err := resolve(ctx); return yes(err) },
		"token": func(ctx context.Context) (string, error) {
			a, err := resolve(ctx)
			if err != nil {
				return "", err
			}
			c, err := authn.Authorization(ctx, a)
			if err != nil {
				return "", err
			}
			return c.Password, nil
		},
	}}
}

// openTelemetry is the detector of resources, which requests no token.
func openTelemetry(string) library {
	attributeOf := func(ctx context.Context, key attribute.Key) (string, error) {
		r, err := gcp.NewDetector().Detect(ctx)
		if err != nil {
			return "", err
		}
		v, ok := r.Set().Value(key)
		if !ok {
			return "", errors.New("the resource has no " + string(key))
		}
		return v.AsString(), nil
	}
	return library{"go.opentelemetry.io/contrib/detectors/gcp", asks{
		"detect": func(ctx context.Context) (string, error) {
			name, err := attributeOf(ctx, "k8s.cluster.name")
			return strconv.FormatBool(name == "my-cluster"), err
		},
		"project": func(ctx context.Context) (string, error) { return attributeOf(ctx, "cloud.account.id") },
	}}
}
