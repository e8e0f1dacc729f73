package main

import (
	"log/slog"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/alibaba"
)

// newAlibaba makes the backend of a key of Alibaba Cloud KMS.
func newAlibaba(a *config.Alibaba, log *slog.Logger) (*backend, error) {
	return alibabaBackend(alibabaConfig(a, log))
}

// alibabaConfig says to the backend what the file says.
func alibabaConfig(a *config.Alibaba, log *slog.Logger) alibaba.Config {
	c := a.Credentials
	return alibaba.Config{
		Region: a.Region, KeyID: a.KeyID, Endpoint: a.Endpoint, CAFile: a.CAFile, EncryptionContext: a.EncryptionContext,
		Credentials: alibaba.Credentials{
			Type:            c.Type,
			AccessKeyIDFile: c.AccessKeyIDFile, AccessKeySecretFile: c.AccessKeySecretFile, SecurityTokenFile: c.SecurityTokenFile,
			Base: c.Base, RoleARN: c.RoleARN, OIDCProviderARN: c.OIDCProviderARN, OIDCTokenFile: c.OIDCTokenFile,
			ExternalID: c.ExternalID, SessionName: c.SessionName, Policy: c.Policy, Duration: c.Duration,
			STSEndpoint: c.STSEndpoint, STSCAFile: c.STSCAFile,
			RoleName: c.RoleName, AllowMetadataV1: c.AllowMetadataV1,
		},
		Logger: log,
	}
}

func alibabaBackend(c alibaba.Config) (*backend, error) {
	b, err := alibaba.New(c)
	if err != nil {
		return &backend{kind: "alibaba"}, err
	}
	return &backend{kind: "alibaba", service: b, describe: b.Describe, closer: b}, nil
}
